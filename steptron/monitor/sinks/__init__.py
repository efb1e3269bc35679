"""Where frames end up: a module a destination, each a `frame.Sink`: `write`, `flush`, `truncate_after`, `close`."""
