"""What the deepspeed launcher runs: `deepspeed train.py --ds ds_configs/zero3.json [--config
X.yaml] [key.path=value …]`.

From here to `backward` it is three hops: makd_llm/pipeline.py, makd_llm/train/loop.py,
makd_llm/train/step.py.
"""

import sys

from makd_llm.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
