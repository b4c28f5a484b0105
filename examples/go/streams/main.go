// Follows the comments, and resumes after the last one that it has seen.
package main

import (
	"bufio"
	"fmt"
	"net/http"
	"net/url"

	"examples/internal"
)

func open(lastID string) *bufio.Reader {
	request := internal.Must(http.NewRequest("GET", internal.API+"/api/v1/comments/stream", nil))
	if lastID != "" {
		request.Header.Set("Last-Event-ID", lastID)
	}
	return bufio.NewReader(internal.Must(http.DefaultClient.Do(request)).Body)
}

func main() {
	stream := open("")
	for _, text := range []string{"one", "two"} {
		internal.Must(http.PostForm(internal.API+"/api/v1/comments", url.Values{"text": {text}}))
	}
	id, first := internal.NextEvent(stream)
	_, second := internal.NextEvent(open(id))
	fmt.Println(first)
	fmt.Println(second)
}
