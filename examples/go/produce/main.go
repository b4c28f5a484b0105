// Writes a batch of records to a topic and prints where each one is.
package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"strings"

	"examples/internal"
)

func main() {
	topic := cmp.Or(os.Getenv("TOPIC"), "example")
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
