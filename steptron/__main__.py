"""`python -m steptron`, and so `torchrun … -m steptron`: the same as the `steptron` command."""

from steptron.cli.main import entry

if __name__ == "__main__":
    entry()
