"""`python -m llmtrain VERB …`."""

import sys

from llmtrain.cli import entry_point

if __name__ == "__main__":
    sys.exit(entry_point())
