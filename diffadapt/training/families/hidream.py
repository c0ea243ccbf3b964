"""HiDream."""

from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.training.families.family import Caption, Pipeline, Process, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import encoder_device, negated, pixels
from diffadapt.training.families.pictures import sampled
from diffadapt.training.families.schedules import refuse_distilled, static_shift


def _process(pipe: Pipeline) -> Process:
    if pipe.text_encoder_4 is None:
        raise AdapterError(
            "this pipeline has no text_encoder_4: the published one comes without it. Load Llama 3.1 8B Instruct as a "
            "LlamaForCausalLM, and its tokenizer, pass them to HiDreamImagePipeline.from_pretrained as text_encoder_4 "
            "and tokenizer_4, and train on the folder that this pipeline is saved in"
        )
    return "flow"


def _refusal(pipe: Pipeline) -> str | None:
    return refuse_distilled(pipe, "dev", "fast")


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    # Padding of T5 and Llama is attended to, so nothing is left out.
    hidden, _, layers, _, pooled, _ = pipe.encode_prompt(
        [caption.text],
        device=encoder_device(pipe),
        do_classifier_free_guidance=False,
        max_sequence_length=caption.max_tokens,
    )
    # (layers of Llama, 1, tokens, channels); the model reads only some of them.
    chosen = sorted(set(pipe.transformer.config.llama_layers))
    return {"hidden": hidden[0], "layers": layers[chosen, 0], "pooled": pooled[0]}


def _inputs(step: Step) -> dict[str, Any]:
    # The model indexes layers by their number, so those that it does not read need a place, too.
    numbers = step.pipe.transformer.config.llama_layers
    chosen = sorted(set(numbers))
    layers = step["layers"].transpose(0, 1)
    every = layers.new_zeros(max(numbers) + 1, *layers.shape[1:])
    every[chosen] = layers
    return {
        "hidden_states": step.x,
        "timesteps": 1000 * step.level,
        "encoder_hidden_states_t5": step["hidden"],
        "encoder_hidden_states_llama3": every,
        "pooled_embeds": step["pooled"],
    }


HIDREAM = TrainingFamily(
    name="hidream",
    pipelines=("HiDreamImagePipeline",),
    encode=_encode,
    encode_pictures=sampled,
    inputs=_inputs,
    read=negated,
    process=_process,
    divisor=pixels(2),
    targets=("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t"),
    shift=static_shift,
    max_tokens=128,
    refusal=_refusal,
)
