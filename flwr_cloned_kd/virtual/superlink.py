"""What Flower's SuperLink does to messages, for a grid that runs without a SuperLink.

All uses of Flower's private names by this package are in this module.
"""

from flwr.app import Error, Message

PROCESS_ID = 1
"""Run, task and node id of a process to which Flower gave none."""


def identify_process() -> None:
    """Give this process an identity: without one Flower refuses to create messages.

    Flower sets the identity in the processes that it starts. An identity that is set stays.
    """
    # Imported here, so that the rest of the package still imports if Flower moves this module.
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("run_id", "task_id", "node_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, PROCESS_ID)


def assign_id(message: Message, message_id: str) -> str:
    """Assign the id by which a reply refers to its request, and return it.

    The id of a new message is "" and `Metadata` has no setter for it. Flower's own grids write
    the same private key when they push a message.
    """
    message.metadata.__dict__["_message_id"] = message_id
    return message_id


def replace_by_error(reply: Message, error: Error) -> None:
    """Turn a reply into an error reply, in place.

    Flower creates an error reply from its request, which a grid need not keep that long. The
    setter of `Message.error` refuses a message with content, and that of `Message.content` is
    typed so that content cannot be removed.
    """
    reply.__dict__.update(_content=None, _error=error)
