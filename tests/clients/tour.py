"""Does the README's tour with a client that is generated from the API description."""

import os
import time

from client import Client
from client.api.comments import list_comments, post_comment, stream_comments
from client.api.dlq import list_dead_letters
from client.api.feed import create_post, follow_user, get_feed, unfollow_user
from client.api.gateway import get_health, produce_records
from client.api.kv import delete_value, pull_value, push_value
from client.api.messages import (
    acknowledge_messages,
    count_unread_messages,
    get_presence,
    list_messages,
    send_message,
    stream_messages,
)
from client.api.service import get_index, get_metrics
from client.models import (
    Acknowledgement,
    BatchProduced,
    CommentDraft,
    FollowDraft,
    Message,
    PostDraft,
    Presence,
    PresenceState,
    Problem,
    ProduceRecord,
    ProduceRequest,
    PushRequest,
    RecordFailed,
    RecordProduced,
    RecordStored,
)

TOPIC = os.environ["TOPIC"]
client = Client(base_url=os.environ["API_URL"], timeout=30.0)


def eventually(what, look):
    """Calls `look` until it returns something, for at most 20 s."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"not within 20 s: {what}")


def values():
    pushed = push_value.sync_detailed(client=client, body=PushRequest(key="py", value={"hello": ["world"]}))
    assert pushed.parsed.status == "accepted", pushed
    after = pushed.headers["Postrider-Position"]
    pulled = pull_value.sync("py", client=client, postrider_after=after)
    assert (pulled.key, pulled.value) == ("py", {"hello": ["world"]}), pulled
    deleted = delete_value.sync_detailed("py", client=client)
    missing = pull_value.sync("py", client=client, postrider_after=deleted.headers["Postrider-Position"])
    assert isinstance(missing, Problem) and missing.code == "key_not_found", missing


def records():
    body = ProduceRequest(topic=TOPIC, key="k", payload={"message": "Hello Kafka!"})
    one = produce_records.sync(client=client, body=body)
    assert isinstance(one, RecordProduced) and one.topic == TOPIC, one
    batch = [ProduceRecord(key="a", payload=1), ProduceRecord(key="b"), ProduceRecord(key="a", payload=3)]
    mixed = produce_records.sync(client=client, body=ProduceRequest(topic=TOPIC, records=batch))
    assert isinstance(mixed, BatchProduced), mixed
    assert [type(result) for result in mixed.results] == [RecordStored, RecordFailed, RecordStored], mixed


def comments():
    sent = post_comment.sync(client=client, body=CommentDraft(text="nice", author_id="ann", post_id="py-7"))
    assert sent.comment.text == "nice" and sent.comment.post_id == "py-7", sent
    listed = eventually("the comment is listed", lambda: list_comments.sync(client=client, post_id="py-7").comments)
    assert [comment.text for comment in listed] == ["nice"], listed
    assert listed[0].created_at.tzinfo is not None, "it is a time"
    resumed = lambda: stream_comments.sync(client=client, last_event_id="0.0-0-0")
    eventually("the stream has the comment", lambda: listed[0].id in resumed())


def messages():
    body = Message(chat_id="c", sender_id="ann", receiver_id="py-bob", content="hello")
    assert send_message.sync(client=client, body=body) == "Message Sent"
    page = eventually("the message is listed", lambda: list_messages.sync(client=client, receiver_id_query="py-bob").messages)
    assert page[0].data.to_dict() == body.to_dict(), page
    unread = count_unread_messages.sync(client=client, receiver_id_query=["py-bob"])
    assert unread.unread == 1, unread
    live = lambda: stream_messages.sync(client=client, receiver_id_query="py-bob")
    eventually("the stream has the message", lambda: '"content":"hello"' in live())
    after = acknowledge_messages.sync(client=client, body=Acknowledgement(receiver_id="py-bob", ack=unread.last))
    assert after.unread == 0 and after.oldest is None, after
    # Unknown (503) for a moment after the start with an empty Redis.
    known = lambda: isinstance(found := get_presence.sync("py-nobody", client=client), Presence) and found
    presence = eventually("presence is known", known)
    assert presence.state is PresenceState.DISCONNECTED, presence


def feeds():
    follow = FollowDraft(follower_id="py-bea", followee_id="py-ann")
    assert follow_user.sync(client=client, body=follow).message == "followed successfully"
    posted = create_post.sync(client=client, body=PostDraft(author_id="py-ann", content="first"))
    posts = eventually("the post is in the feed", lambda: get_feed.sync("py-bea", client=client, expand="posts").posts)
    assert [(post.id, post.content) for post in posts] == [(posted.post_id, "first")], posts
    unfollow_user.sync(client=client, body=follow)
    assert get_feed.sync("py-bea", client=client).post_ids == []


def service():
    assert get_health.sync(client=client).status == "healthy"
    assert get_index.sync(client=client).docs == "/docs"
    assert "http_server_request_duration_seconds" in get_metrics.sync(client=client)
    assert list_dead_letters.sync(client=client, since="2h").letters == []


for step in (values, records, comments, messages, feeds, service):
    step()
print("the tour is done")
