"""Train an adapter on a few pictures of a subject or a style, for every family of image pipelines.

    python train_dreambooth.py --pretrained_model_name_or_path FOLDER_OR_HUB_ID \
        --instance_data_dir pictures/ --instance_prompt "a photo of sks dog" --output_dir sks-dog

This is `diffadapt train` as a script: the same options, and a config file with them as the first argument. With
`--resume_from_checkpoint latest` an interrupted run continues exactly from its last checkpoint. Start the script with
`accelerate launch` to use several devices.
"""

import argparse
import sys
from collections.abc import Sequence

import diffadapt
from diffadapt.training.option_sources import add_options, options_from


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", help="TOML file with options; those of the command line take precedence")
    add_options(parser)
    given = vars(parser.parse_args(argv))
    try:
        diffadapt.train(options_from(given.pop("config"), given))
    except diffadapt.Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except diffadapt.AdapterError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
