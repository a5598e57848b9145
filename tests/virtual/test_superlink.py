"""The three functions that use Flower's private names: if Flower changes, these tests fail."""

import pytest
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flwr_cloned_kd.virtual.superlink import assign_id, identify_process, replace_by_error


def request():
    return Message(RecordDict({"arrays": ArrayRecord()}), dst_node_id=100, message_type="train")


def test_identify_process_lets_a_process_create_messages(monkeypatch):
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="is not set"):
        request()
    identify_process()
    assert request().metadata.run_id == 1


def test_identify_process_keeps_an_identity_that_flower_has_set(monkeypatch):
    monkeypatch.setattr(TaskIdentity, "_run_id", 7)
    identify_process()
    assert TaskIdentity.run_id == 7


def test_a_reply_refers_to_the_id_that_assign_id_gave_its_request():
    message = request()
    assert message.metadata.message_id == ""
    assert assign_id(message, "message-1") == "message-1"
    assert message.metadata.message_id == "message-1"
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.reply_to_message_id == "message-1"


@pytest.mark.parametrize("first", [RecordDict(), Error(2, "the app raised")])
def test_replace_by_error_leaves_an_error_without_content(first):
    message = request()
    assign_id(message, "message-1")
    reply = Message(first, reply_to=message)
    replace_by_error(reply, Error(5, "node offline"))
    assert not reply.has_content()
    assert (reply.error.code, reply.error.reason) == (5, "node offline")
    assert reply.metadata.reply_to_message_id == "message-1"
    assert reply.metadata.src_node_id == 100
