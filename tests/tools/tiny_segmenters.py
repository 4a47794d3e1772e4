"""Folders of tiny models with random weights: the real classes of transformers, no download."""

import torch
import transformers as tf


def panoptic(folder, classes=133, size=64):
    """A Mask2Former of `classes` classes; logits are scaled up, so that queries are sure."""
    torch.manual_seed(0)
    swin = tf.SwinConfig(
        image_size=size, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = tf.Mask2FormerConfig(
        backbone_config=swin, num_labels=classes, feature_size=32, mask_feature_size=32,
        hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, dim_feedforward=16, num_queries=10,
    )  # fmt: skip
    model = tf.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight *= 200
    model.save_pretrained(folder)
    processor = tf.Mask2FormerImageProcessor(size={"height": size, "width": size}, ignore_index=255)
    processor.save_pretrained(folder)
    return folder


def detector(folder, size=128):
    """A Grounding DINO with a tokenizer of the words in the tests."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] . fish snail label_0 label_1 boa constrictor".split()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = tf.BertTokenizer(str(folder / "vocab.txt"))
    swin = tf.SwinConfig(
        image_size=size, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    text = tf.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    config = tf.GroundingDinoConfig(
        backbone_config=swin, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, num_queries=12, max_text_len=32,
    )  # fmt: skip
    tf.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    reader = tf.GroundingDinoImageProcessor(size={"height": size, "width": size})
    tf.GroundingDinoProcessor(reader, tokenizer).save_pretrained(folder)
    return folder


def segmenter(folder, size=64, hq=True):
    """A SAM-HQ, or a SAM."""
    torch.manual_seed(0)
    name = "SamHQ" if hq else "Sam"
    vision = getattr(tf, f"{name}VisionConfig")(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=size, patch_size=16,
        output_channels=8, global_attn_indexes=[1], window_size=2, mlp_dim=16,
        num_pos_feats=4, **({} if hq else {}),
    )  # fmt: skip
    prompt = getattr(tf, f"{name}PromptEncoderConfig")(
        hidden_size=8, image_size=size, patch_size=16, mask_input_channels=4
    )
    extra = {"vit_dim": 16} if hq else {}
    decoder = getattr(tf, f"{name}MaskDecoderConfig")(
        hidden_size=8, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2,
        iou_head_hidden_dim=8, **extra,
    )  # fmt: skip
    config = getattr(tf, f"{name}Config")(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    getattr(tf, f"{name}Model")(config).save_pretrained(folder)
    reader = tf.SamImageProcessor(
        size={"longest_edge": size}, pad_size={"height": size, "width": size}
    )
    getattr(tf, f"{name}Processor")(reader).save_pretrained(folder)
    return folder
