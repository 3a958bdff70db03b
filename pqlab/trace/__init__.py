"""What happened: a decode written down step by step (`record`), and the data it leaves (`data`)."""

from .data import DecodeTrace
from .record import trace_decode

__all__ = ["DecodeTrace", "trace_decode"]
