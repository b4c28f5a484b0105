"""Writes a value and reads it back: the read waits until it sees the write."""
import json, os
from urllib.request import Request, urlopen

api = os.environ.get("API_URL", "http://127.0.0.1:8080")
value = {"key": "python", "value": {"visits": 2}}
push = Request(f"{api}/push", json.dumps(value).encode(), {"Content-Type": "application/json"})
with urlopen(push) as answer:  # 202: Kafka has the record
    position = answer.headers["Postrider-Position"]
with urlopen(Request(f"{api}/pull/python", headers={"Postrider-After": position})) as answer:
    print(json.load(answer)["value"])
