// Writes a batch of records to a topic and prints where each one is.
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"strings"

	"examples/internal"
)

func main() {
	topic := internal.Env("TOPIC", "example")
	batch := fmt.Sprintf(`{"topic":%q,"records":[{"key":"a","payload":1},{"key":"b","payload":[2]}]}`, topic)
	answer := internal.Must(http.Post(internal.API+"/produce", "application/json", strings.NewReader(batch)))
	var stored struct {
		Results []struct{ Partition, Offset int64 }
	}
	if err := json.NewDecoder(answer.Body).Decode(&stored); err != nil {
		log.Fatal(err)
	}
	for _, result := range stored.Results {
		fmt.Println(result.Partition, result.Offset)
	}
}
