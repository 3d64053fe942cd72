"""Between the payload in memory and the text in a row: Django's signed format.

Called by `tiers` and `flusher` when a session goes to or comes from PostgreSQL.
Invariant: what `to_text` makes, Django's own `db` engine reads, and the reverse; so a
project may come from `django.contrib.sessions` and go back without a conversion.

Django's `signing.dumps` derives its key anew for each value. Here the derived key is
kept, which makes signing a batch about four times as fast.
"""

from __future__ import annotations

import logging
import zlib
from binascii import b2a_base64
from collections.abc import Iterable
from typing import Final

from django.core import signing
from django.utils.crypto import salted_hmac

from deferred_sessions.exceptions import RecordCorruptError

_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")

logger = logging.getLogger(__name__)

SALT: Final = "django.contrib.sessions.SessionStore"  # as Django's db engine has it
COMPRESS_FROM: Final = 512  # bytes; below that, compression costs more than it saves


class _Verbatim:
    """A serializer that hands the payload through, for `signing.loads`."""

    def dumps(self, obj: bytes) -> bytes:
        return obj

    def loads(self, data: bytes) -> bytes:
        return data


class RowEncoder:
    """Signs payloads into row text and back.

    Made when the runtime is built; reads SECRET_KEY through Django's signer then, and
    SECRET_KEY_FALLBACKS whenever it verifies.
    """

    def __init__(self) -> None:
        self._signer = signing.TimestampSigner(salt=SALT)
        self._unfinished = salted_hmac(
            f"{SALT}signer", b"", self._signer.key, algorithm=self._signer.algorithm
        )

    def to_texts(self, payloads: Iterable[bytes]) -> list[str]:
        """Return the row text of each of `payloads`, signed with the time of day."""
        timestamp = f":{self._signer.timestamp()}".encode()
        new_mac = self._unfinished.copy
        texts = []
        for payload in payloads:
            if len(payload) < COMPRESS_FROM:
                signed = _base64(payload) + timestamp
            else:
                signed = _compressed(payload) + timestamp
            mac = new_mac()
            mac.update(signed)
            texts.append((signed + b":" + _base64(mac.digest())).decode("ascii"))
        return texts

    def to_payload(self, text: str) -> bytes:
        """Return the payload in a row's `text`, after checking its signature.

        Raises:
            RecordCorruptError: Not signed with this project's key, or damaged.
        """
        try:
            payload: bytes = signing.loads(text, salt=SALT, serializer=_Verbatim)
        except signing.BadSignature as error:
            raise RecordCorruptError("Session data corrupted") from error
        except (ValueError, zlib.error) as error:
            raise RecordCorruptError("Session data corrupted") from error
        return payload


def _compressed(payload: bytes) -> bytes:
    """Return `payload` in base64, and compressed if that is shorter."""
    compressed = zlib.compress(payload)
    if len(compressed) < len(payload) - 1:
        return b"." + _base64(compressed)
    return _base64(payload)


def _base64(data: bytes) -> bytes:
    """Do what `signing.b64_encode` does, without its detours."""
    return b2a_base64(data, newline=False).translate(_URL_SAFE).rstrip(b"=")
