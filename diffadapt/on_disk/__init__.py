"""From files to files, without a pipeline: LoRAs out of models, adapters into models, adapters made smaller or one."""
