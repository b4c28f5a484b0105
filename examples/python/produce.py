"""Writes a batch of records to a topic and prints where each one is."""
import json, os, uuid
from urllib.request import Request, urlopen

api = os.environ.get("API_URL", "http://127.0.0.1:8080")
batch = {"topic": os.environ.get("TOPIC", "example"), "records": [{"key": "a", "payload": 1}, {"key": "b", "payload": [2]}]}
# With the same key, the request can be repeated after any failure.
headers = {"Content-Type": "application/json", "Idempotency-Key": str(uuid.uuid4())}
with urlopen(Request(f"{api}/produce", json.dumps(batch).encode(), headers)) as answer:
    for result in json.load(answer)["results"]:
        print(result["partition"], result["offset"])
