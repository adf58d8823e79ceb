"""`python -m pallas_attn.fuzz`, the same as `python -m pallas_attn fuzz`."""

import sys

from pallas_attn.fuzz.command import main


if __name__ == "__main__":
    sys.exit(main())
