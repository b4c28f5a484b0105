// Package internal has what all examples need.
package internal

import (
	"bufio"
	"log"
	"os"
	"strings"
)

// API is the address of postrider.
var API = Env("API_URL", "http://127.0.0.1:8080")

// Env returns a variable of the environment, or a default.
func Env(name, other string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return other
}

// Must returns a value, or ends the program with the error.
func Must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

// NextEvent returns the id and the data of the next server-sent event.
func NextEvent(stream *bufio.Reader) (id, data string) {
	for {
		line := strings.TrimSpace(Must(stream.ReadString('\n')))
		if name, value, found := strings.Cut(line, ":"); found && name == "id" {
			id = strings.TrimSpace(value)
		} else if found && name == "data" {
			return id, strings.TrimSpace(value)
		}
	}
}
