"""The destinations of frames: one module each, with a `frame.Sink`: `write`, `flush`, `truncate_after`, `close`."""
