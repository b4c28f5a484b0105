"""Sends a message and receives it as a server-sent event."""
import json, os
from urllib.request import Request, urlopen

api = os.environ.get("API_URL", "http://127.0.0.1:8080")
message = {"chatId": "c", "senderId": "ann", "receiverId": "python", "content": "hello"}
stream = urlopen(f"{api}/api/v1/messages/stream?receiverId=python")
urlopen(Request(f"{api}/api/v1/message/action", json.dumps(message).encode(), {"Content-Type": "application/json"}))
for line in stream:  # "id: CURSOR", "data: JSON", and an empty line for each message
    if line.startswith(b"data:"):
        print(json.loads(line[5:])["content"])
        break
