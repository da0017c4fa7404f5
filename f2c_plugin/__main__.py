"""``python -m f2c_plugin`` is the command ``f2c-plugin``."""

from f2c_plugin.cli import main

main()
