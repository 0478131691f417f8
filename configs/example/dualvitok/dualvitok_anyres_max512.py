"""DualViTok at full size, trained on aspect ratios of about 512 x 512 pixels: 1.35 G parameters, 0.79 G to encode."""

vq_model = dict(
    type="DualViTok",
    config=dict(
        semantic_encoder=dict(
            semantic_encoder="Emova-ollm/qwen2vit600m",  # its sizes; its weights are in the checkpoint
            num_blocks=4,
            embed_dim=1280,
            z_channels=32,
            proj_layer="linear",
            target_mlp="norm",
        ),
        semantic_quantizer=dict(type="SimVQ", dim=32, codebook_size=32768),
        semantic_decoder=dict(
            num_blocks=4,
            embed_dim=1280,
            z_channels=32,
            output_channels=3584,
            proj_layer="linear_norm",
        ),
        pixel_encoder=dict(
            ch=128,
            ch_mult=[1, 1, 2, 2, 4],
            num_res_blocks=2,
            attn_resolutions=[4],  # levels, counted from 0 at full resolution
            z_channels=32,
            embed_dim=32,
            use_dc_up_down_blocks=True,
        ),
        pixel_quantizer=dict(type="SimVQ", dim=32, codebook_size=98304),
        pixel_decoder=dict(
            ch=384,
            ch_mult=[1, 1, 2, 2, 4],
            num_res_blocks=2,
            attn_resolutions=[4],
            z_channels=64,
            embed_dim=64,  # both quantizers' dims: what the decoder's norms see
            use_dc_up_down_blocks=True,
        ),
    ),
)
