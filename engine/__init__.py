"""What surrounds a training loop, so that the loop itself can stand in the script.

    config, field, flags  arg, Config, parse               a dataclass is the command line
    ranks               World, command                     device, precision, agreement of ranks
    schedule            decay_groups, layer_decay_groups   and the shape of a rate
    checkpoint, reader  save, load, load_weights, read     plain types, atomic, weights_only=True
    folder              open_folder, open_data             a run's folder, its frozen list of files
    log                 Meter                              log.jsonl, a loss that is not finite
    run, loop, step     Run, Step, cosine                  the loop's surroundings
    validate            validate, picture                  the val split's means, four of its images
    report              screen, learned, following         what a run says at its start and its end

Arrows go one way: scripts -> engine -> data.
"""

import os

# OpenMP's threads otherwise wait for one another in a busy loop: on a CPU with anything else to do,
# loader processes included, a step then takes many times as long. So they sleep, though after a
# short look for work: in a small model's step the next piece is there by then (docs/speed.md).
# Both are read when torch is loaded; the second is libgomp's, which Linux has.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from data import UserError
from engine.checkpoint import FORMAT, load, load_config, load_encoder, load_optimizer, load_weights
from engine.checkpoint import save, warn_of_space, writing
from engine.config import Config
from engine.field import arg, divides, flag, nearest, require
from engine.flags import Parser, parse
from engine.folder import open_data, open_folder, refuse_changes
from engine.log import Meter
from engine.ranks import World, command, has_bf16, keep_freed_memory
from engine.reader import read, read_state, unwrap
from engine.run import Run
from engine.schedule import decay_groups, layer_decay_groups, warmup_cosine
from engine.step import Step, cosine
from engine.validate import evenly
