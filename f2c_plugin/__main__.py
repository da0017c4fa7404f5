"""``python -m f2c_plugin`` is the command ``f2c-plugin``."""

import signal
import sys


def main() -> None:
    try:
        from f2c_plugin.cli import main  # takes seconds, in which Ctrl-C may come
    except KeyboardInterrupt:
        print("f2c-plugin: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done; Ctrl-C would interrupt Python's own end


if __name__ == "__main__":
    main()
