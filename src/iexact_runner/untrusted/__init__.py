"""Files of strangers: each is checked by its format before a library reads it. A check raises ``ValueError``."""

from __future__ import annotations
