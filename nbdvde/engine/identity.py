"""What identifies a disk or a snapshot for ever, wherever its name goes."""

import uuid


def volume_uuid(image: bytes, number: int) -> uuid.UUID:
    """UUID of a volume: version 5 (RFC 9562) of `nbdvde volume NUMBER` in the namespace of the image's uuid."""
    return uuid.uuid5(uuid.UUID(bytes=image), f"nbdvde volume {number}")


def member_uuid(namespace: bytes, label: str, created_ns: int) -> uuid.UUID:
    """UUID of a disk, with 0, or of a snapshot of some time, in all images of a cluster: their numbers differ.

    Version 5 of `nbdvde member LABEL TIME` in the namespace that the cluster goes by.
    """
    return uuid.uuid5(uuid.UUID(bytes=namespace), f"nbdvde member {label} {created_ns}")


def subject_uuid(image: bytes, text: str) -> uuid.UUID:
    """UUID of a data subject: the one that the text is, or else version 5 of the text in the namespace of the image."""
    try:
        return uuid.UUID(text)
    except ValueError:
        return uuid.uuid5(uuid.UUID(bytes=image), text)
