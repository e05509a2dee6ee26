"""Text → token ids, and what each id prints as; from a GGUF file's own metadata or a folder's tokenizer.json."""

from realtime_serve.tokenizer.tokenizer import Tokenizer, TokenVocabulary

__all__ = ["TokenVocabulary", "Tokenizer"]
