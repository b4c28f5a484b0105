// Sends a message and receives it as a server-sent event.
package main

import (
	"bufio"
	"fmt"
	"net/http"
	"strings"

	"examples/internal"
)

func main() {
	stream := internal.Must(http.Get(internal.API + "/api/v1/messages/stream?receiverId=go"))
	message := strings.NewReader(`{"chatId":"c","senderId":"ann","receiverId":"go","content":"hello"}`)
	internal.Must(http.Post(internal.API+"/api/v1/message/action", "application/json", message))
	_, data := internal.NextEvent(bufio.NewReader(stream.Body))
	fmt.Println(data)
}
