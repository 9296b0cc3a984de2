"""Adapters on embeddings that other tensors are tied to."""

from __future__ import annotations

import pytest

import fastmerge

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def trained(folder, made, config, **lora):
    """A base and an adapter on it, saved; PEFT's model of both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = made(config)
        model.save_pretrained(folder / "base")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **lora))
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.05)
    wrapped.save_pretrained(folder / "adapter")
    base = made.from_pretrained(folder / "base")
    return peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval()


def folded(folder, made):
    report = fastmerge.fold(folder / "base", folder / "adapter", folder / "out")
    model, loading = made.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(loading[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    return model.eval(), report


@pytest.mark.filterwarnings("ignore")
def test_embeddings_that_stay_tied_in_an_encoder_with_a_decoder_are_told(tmp_path):
    made = transformers.BartForConditionalGeneration
    config = transformers.BartConfig(
        vocab_size=60, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    trained(tmp_path, made, config, target_modules=["q_proj"], modules_to_save=["shared"])
    _, report = folded(tmp_path, made)
    assert any("it stays tied, to the changed one" in note for note in report.notes)
