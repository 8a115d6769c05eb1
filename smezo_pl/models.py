"""Pretrained language models, causal or masked: a hub name, a local folder or a GGUF file; adapters through PEFT."""

import logging
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Kind = Literal["causal", "masked"]

_MASKED_HEADS = ("ForMaskedLM", "ForPreTraining")


def load_model(
    pretrained: str | Path, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a language model and its tokenizer.

    Args:
        pretrained: Name on the Hugging Face hub, local folder in its format, or a ``.gguf`` file.
        dtype: Type of the weights; they are read into it directly, so memory holds one copy. None: torch's default.
        revision: Branch, tag or commit on the hub.

    Returns:
        The network, in ``eval()`` mode on the CPU, and the tokenizer with a pad token.

    Raises:
        FileNotFoundError: If ``pretrained`` is a path and nothing is there.
        ModuleNotFoundError: If a GGUF file is named and the packages that read it are missing.
        OSError: If the hub does not give the model.
        ValueError: If the checkpoint lacks weights of the network, or is an encoder-decoder model.
    """
    return load_network(pretrained, dtype=dtype, revision=revision), load_tokenizer(pretrained, revision=revision)


def load_network(
    pretrained: str | Path, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> "PreTrainedModel":
    """Load the network alone; arguments and errors as in `load_model`.

    A masked language model is loaded as one (see `kind_of`), everything else as a causal one.
    """
    where, arguments = _locate(pretrained, revision)
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    masked = kind_of(pretrained, revision=revision) == "masked"
    dtype = dtype or torch.get_default_dtype()
    if "gguf_file" in arguments:
        arguments |= _unpacked()
    try:
        # Lightning builds inside a device context, for which transformers would need accelerate.
        with torch.device("cpu"):
            auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
            loaded: Any = auto.from_pretrained(where, dtype=dtype, output_loading_info=True, **arguments)
    except OSError as error:
        raise _not_given(pretrained, error) from error
    network: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ValueError(
            f"pretrained={str(pretrained)!r} lacks {len(missing)} of the weights of {type(network).__name__}, which "
            f"would be random: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    network.train(False)
    size = sum(p.numel() for p in network.parameters())
    logger.info("%s: %s, %s parameters, %s, %s", pretrained, type(network).__name__, f"{size:,}", dtype, network.device)
    if masked:
        logger.info("%s is a masked language model: it answers where the prompt holds a mask", pretrained)
    return network


def kind_of(pretrained: "str | Path | nn.Module", *, revision: str | None = None) -> Kind:
    """Whether a model goes on with a text (``causal``) or fills in a mask (``masked``).

    A model is masked if its configuration names such a head (``RobertaForMaskedLM``), or names none and its type has
    such a head and is an encoder. Everything else, and every GGUF file, is causal.

    Args:
        pretrained: As in `load_model`, or a network.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: For an encoder-decoder model, such as T5.
    """
    if isinstance(pretrained, nn.Module):
        base = getattr(pretrained, "get_base_model", None)
        network = base() if callable(base) else pretrained
        named = (type(network).__name__,)
        return _kind(getattr(network, "config", None), named, type(network).__name__)
    where, arguments = _locate(pretrained, revision)
    if "gguf_file" in arguments:
        return "causal"
    from transformers import AutoConfig

    if (Path(where) / "adapter_config.json").is_file() and not (Path(where) / "config.json").is_file():
        # A folder of PEFT's: transformers finds the base model by itself.
        return "causal"
    try:
        config = AutoConfig.from_pretrained(where, **arguments)
    except OSError as error:
        raise _not_given(pretrained, error) from error
    return _kind(config, tuple(config.architectures or ()), str(pretrained))


def _kind(config: Any, architectures: tuple[str, ...], called: str) -> Kind:
    if getattr(config, "is_encoder_decoder", False) is True:
        raise ValueError(
            f"{called} is an encoder-decoder model ({config.model_type}): only causal models (LLaMA, OPT, GPT-2, ...) "
            "and masked ones (RoBERTa, BERT, ...) are supported"
        )
    if any(name.endswith(_MASKED_HEADS) for name in architectures):
        return "masked"
    if config is None or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return "causal"
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = str(getattr(config, "model_type", ""))
    head = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, "")
    # BERT's family has both heads; as a decoder it says so.
    only_masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not head
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False
    return "masked" if only_masked or encoder else "causal"


def load_tokenizer(pretrained: str | Path, *, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer alone, padding on the left; arguments and errors as in `load_model`."""
    where, arguments = _locate(pretrained, revision)
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **arguments)
    except OSError as error:
        raise _not_given(pretrained, error) from error
    return with_pad_token(tokenizer)


def with_pad_token(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Give a tokenizer that has no pad token one of its own tokens for it (padding is masked, so any will do)."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        logger.info("the tokenizer has no pad token: %r pads", tokenizer.pad_token)
    return tokenizer


def add_adapter(model: nn.Module, adapter: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Freeze a network and put a PEFT adapter on it, which alone is trained.

    Args:
        model: The network.
        adapter: ``peft_type`` (``LORA``, ``PREFIX_TUNING``, ...) and the arguments of PEFT's configuration of that
            type.
        seed: Seed of the adapter's own starting weights; torch's generator is left as it was.

    Returns:
        The network with the adapter, in ``eval()`` mode.

    Raises:
        ModuleNotFoundError: If peft is not installed.
        ValueError: If ``peft_type`` is missing or unknown, or an argument does not fit it.
    """
    if find_spec("peft") is None:
        raise ModuleNotFoundError("adapter needs peft: pip install 'smezo_pl[peft]'")
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    types: dict[str, Any] = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    # PEFT has no task for masked models: its plain wrapper takes them as they are.
    task = {} if type(model).__name__.endswith(_MASKED_HEADS) else {"task_type": "CAUSAL_LM"}
    arguments = {**task, **adapter}
    kind = str(arguments.pop("peft_type", "")).upper()
    if kind not in types:
        raise ValueError(
            f"adapter needs peft_type, one of {', '.join(sorted(types))}; got {adapter.get('peft_type')!r}"
        )
    default = torch.get_default_dtype()
    try:
        settings = types[kind](**arguments)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 by a name that it will drop in version 6.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            # drawn in the network's dtype, so that they are the same inside a Trainer's precision and outside
            torch.set_default_dtype(next(model.parameters()).dtype)
            wrapped: nn.Module = peft.get_peft_model(model, settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"adapter={dict(adapter)}: {error}") from error
    finally:
        torch.set_default_dtype(default)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    logger.info("adapter %s: %s parameters are trained, the others are frozen", kind, f"{trained:,}")
    return wrapped.eval()


def _locate(pretrained: str | Path, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What transformers is asked for: a folder or hub name, and the arguments that go with it."""
    name = str(pretrained)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"pretrained={str(pretrained)!r}: there is no such file")
        if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
            raise ModuleNotFoundError(
                f"a GGUF file needs {' and '.join(missing)}: pip install 'smezo_pl[gguf]' "
                f"(pretrained={str(pretrained)!r})"
            )
        return str(path.parent), {"gguf_file": path.name}
    if name and path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            ggufs = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; name one of its GGUF files: {', '.join(ggufs)}" if ggufs else ""
            raise FileNotFoundError(f"pretrained={str(pretrained)!r}: the folder holds no config.json{hint}")
        return str(path), {}
    # A hub name is `name` or `owner/name`: anything else can only be a path.
    if path.is_file() or not name or name[0] in "./~" or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(
            f"pretrained={name!r}: there is no such folder (a path must be a folder with config.json, or a .gguf file)"
        )
    return name, {"revision": revision} if revision else {}


def _unpacked() -> dict[str, Any]:
    """The argument that makes plain weights of a GGUF file's blocks, which cannot be perturbed as they are."""
    import transformers

    # Releases without this class always unpack.
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _not_given(pretrained: str | Path, error: OSError) -> OSError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return OSError(
        f"pretrained={str(pretrained)!r} is neither a folder nor a .gguf file here, and the Hugging Face hub did not "
        f"give it: {reason} (offline? `hf download {pretrained}` keeps a copy that later runs find)"
    )
