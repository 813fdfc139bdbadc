"""The NBD protocol without I/O: bytes in, requests out; replies in, bytes out.

Source: NetworkBlockDevice/nbd, doc/proto.md ("spec"); sections are cited by their titles. Rules of this package:

1. Nothing here reads a socket, a clock or a random number, or waits; the session does.
2. Bytes arrive in any segmentation: whole, one at a time, or with the next message behind them.
3. What a client sends raises `ProtocolError` or nothing. After that error the connection is over.
4. What is kept of a client's bytes is bounded: see `handshake` for options, `connection` for requests.
"""
