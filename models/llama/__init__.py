"""LLaMA-family decoders: config, network, checkpoints, tokenizers."""

from models.llama.checkpoint import load_config
from models.llama.config import LlamaConfig
from models.llama.load import check_vocabulary, load_pretrained
from models.llama.lora import LoraConfig, add_lora, merge_lora, remove_lora
from models.llama.model import LLaMa, TransformerBlock
from models.llama.peft import load_peft, save_peft
from models.llama.presets import PRESETS
from models.llama.save import save_pretrained
from models.llama.scalar import HeadParam, ScalarLLaMa, load_scalar, random_scalar, save_scalar
from models.llama.tokenizer import load_tokenizer

__all__ = [
    "PRESETS",
    "HeadParam",
    "LLaMa",
    "LlamaConfig",
    "LoraConfig",
    "ScalarLLaMa",
    "TransformerBlock",
    "add_lora",
    "check_vocabulary",
    "load_config",
    "load_peft",
    "load_pretrained",
    "load_scalar",
    "load_tokenizer",
    "merge_lora",
    "random_scalar",
    "remove_lora",
    "save_peft",
    "save_pretrained",
    "save_scalar",
]
