"""The log on standard error, as text or as one JSON object a line."""

import logging
from datetime import UTC, datetime
from json import dumps
from typing import Literal


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, what a record has in `fields`, and the traceback of its exception."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return dumps(fields)  # in ASCII: names of files need not be valid text


def configure_logging(form: Literal["text", "json"]) -> None:
    """Send records of level INFO and above to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter("nbdvde: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
