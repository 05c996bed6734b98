"""`python -m onnxc`: the same as the command `onnxc`."""

from onnxc.cli import main

if __name__ == "__main__":
    main()
