// Writes a value and reads it back: the read waits until it sees the write.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"

	"examples/internal"
)

func main() {
	body := strings.NewReader(`{"key":"go","value":{"visits":2}}`)
	pushed := internal.Must(http.Post(internal.API+"/push", "application/json", body)) // 202: Kafka has the record
	pull := internal.Must(http.NewRequest("GET", internal.API+"/pull/go", nil))
	pull.Header.Set("Postrider-After", pushed.Header.Get("Postrider-Position"))
	pulled := internal.Must(http.DefaultClient.Do(pull))
	if _, err := io.Copy(os.Stdout, pulled.Body); err != nil {
		log.Fatal(err)
	}
	fmt.Println()
}
