"""Query a served model over Triton's gRPC protocol: tokens in, tokens out.

    hasten serve MODEL
    python examples/client.py --tokenizer MODEL --prompt "deepspeed is"

Needs `tritonclient[grpc]` and `transformers`, not hasten: it works with any server of Triton's protocol that has a
model with FasterTransformer's tensors.
"""

import argparse

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Prompts of a batch are padded on the right; the model never sees the padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tensor(name: str, values: NDArray[np.uint32]) -> InferInput:
    """An input of type UINT32; the first axis is the batch."""
    result = InferInput(name, list(values.shape), "UINT32")
    result.set_data_from_numpy(values)
    return result


def request_inputs(tokenizer: PreTrainedTokenizerBase, prompts: list[str], output_len: int) -> list[InferInput]:
    """The three inputs that a request needs, for any number of prompts."""
    encoded = tokenizer(prompts, padding=True, return_tensors="np")
    lengths = encoded["attention_mask"].sum(axis=1, keepdims=True)
    return [
        tensor("input_ids", encoded["input_ids"].astype(np.uint32)),
        tensor("input_lengths", lengths.astype(np.uint32)),
        tensor("request_output_len", np.full_like(lengths, output_len, dtype=np.uint32)),
    ]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Continue prompts with a served language model.",
        epilog="gRPC uses the proxy that grpc_proxy, https_proxy or http_proxy names, even for localhost: set "
        "no_proxy=localhost,127.0.0.1, or the server's host, to reach it directly.",
    )
    parser.add_argument("--url", default="localhost:8001", help="HOST:PORT of the server's gRPC endpoint")
    parser.add_argument("--model", default="fastertransformer", help="name of the model on the server")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="folder of the model's tokenizer")
    parser.add_argument("--prompt", nargs="+", default=["deepspeed is"], help="one text or several, sent as one batch")
    parser.add_argument("--output-len", type=int, default=32, help="new tokens for each prompt")
    return parser.parse_args()


def main() -> None:
    """Send the prompts as one request; print the shape of `output_ids`, then each prompt with its continuation."""
    arguments = parse_arguments()
    tokenizer = load_tokenizer(arguments.tokenizer)
    inputs = request_inputs(tokenizer, arguments.prompt, arguments.output_len)
    outputs = [InferRequestedOutput("output_ids"), InferRequestedOutput("sequence_length")]
    with InferenceServerClient(arguments.url) as client:
        try:
            result = client.infer(arguments.model, inputs, outputs=outputs)
        except InferenceServerException as error:
            raise SystemExit(f"{arguments.url}: {error}") from error
    output_ids = result.as_numpy("output_ids")  # [prompts, beams, prompt + new tokens]
    print(output_ids.shape)
    for beams, lengths in zip(output_ids, result.as_numpy("sequence_length"), strict=True):
        print(tokenizer.decode(beams[0, : lengths[0]], skip_special_tokens=True))


if __name__ == "__main__":
    main()
