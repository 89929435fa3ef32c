"""A process that tokenizes: ``python -m penstock.texthost SOCKET``, started by ``wire.TextWorkers`` and never by hand.

It ends when the socket does: nobody would hear it any more.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from array import array
from typing import cast

from penstock.assemble import find_model, read_face
from penstock.base import EngineError, PenstockError
from penstock.llm.prompts import Prompts
from penstock.wire import Chat, Connection, Opening, Refused, Text, Tokens, decode_to_texts, encode

log = logging.getLogger(__name__)


def main(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever serves has been told too, and may still be draining
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    connection = Connection(sock)
    if (frame := connection.receive()) is None:
        return
    opening = decode_to_texts(frame)
    assert isinstance(opening, Opening)
    config = opening.config
    prompts = Prompts(read_face(find_model(config.model), config), cast(int, config.max_model_len))
    while (frame := connection.receive()) is not None:
        connection.send(encode(answer(prompts, decode_to_texts(frame))))


def answer(prompts: Prompts, order: Opening | Text | Chat) -> Tokens | Refused:
    try:
        if isinstance(order, Text):
            special = order.add_special_tokens
            made = prompts.tokenize(order.text, add_special_tokens=special, parse_special=order.parse_special)
            return Tokens(array("I", made["prompt_token_ids"]).tobytes())
        assert isinstance(order, Chat)
        made = prompts.chat(order.messages, **order.options)
        return Tokens(array("I", made["prompt_token_ids"]).tobytes(), made.get("prompt"))
    except PenstockError as error:
        return Refused(error)
    except Exception as error:  # a fault of ours; the next text may be another
        log.exception("a text could not be tokenized")
        what, why = "The text could not be tokenized", type(error).__name__
        return Refused(EngineError("tokenizer_failed", what, why=why, fix="see the log, and report it"))


if __name__ == "__main__":
    main(sys.argv[1])
