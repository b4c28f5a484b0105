"""Follows the comments, and resumes after the last one that it has seen."""
import json, os
from urllib.parse import urlencode
from urllib.request import Request, urlopen

api = os.environ.get("API_URL", "http://127.0.0.1:8080")

def next_comment(last_id):
    headers = {"Last-Event-ID": last_id} if last_id else {}
    with urlopen(Request(f"{api}/api/v1/comments/stream", headers=headers)) as stream:
        if not last_id:  # a new stream starts now, a resumed one where the last one ended
            urlopen(f"{api}/api/v1/comments", urlencode({"text": "one"}).encode())
            urlopen(f"{api}/api/v1/comments", urlencode({"text": "two"}).encode())
        for line in stream:
            if line.startswith(b"id:"):
                last_id = line[3:].strip().decode()
            elif line.startswith(b"data:"):
                return last_id, json.loads(line[5:])["text"]

last_id, first = next_comment(None)
print(first)
print(next_comment(last_id)[1])
