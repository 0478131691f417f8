"""Every part of DualViTok, narrower (7.5 M parameters): for the quickstart and for trying things out on a CPU."""

vq_model = dict(
    type="DualViTok",
    config=dict(
        semantic_encoder=dict(
            vit=dict(depth=4, embed_dim=128, hidden_size=192, num_heads=4, mlp_ratio=4),
            num_blocks=2,
            embed_dim=128,
            z_channels=16,
            proj_layer="linear",
            target_mlp="norm",
        ),
        semantic_quantizer=dict(type="SimVQ", dim=16, codebook_size=2048),
        semantic_decoder=dict(
            num_blocks=2,
            embed_dim=128,
            z_channels=16,
            output_channels=192,
            proj_layer="linear_norm",
        ),
        pixel_encoder=dict(
            ch=32,
            ch_mult=[1, 1, 2, 2, 4],
            num_res_blocks=2,
            attn_resolutions=[4],  # levels, counted from 0 at full resolution
            z_channels=16,
            embed_dim=16,
            use_dc_up_down_blocks=True,
        ),
        pixel_quantizer=dict(type="SimVQ", dim=16, codebook_size=6144),
        pixel_decoder=dict(
            ch=32,
            ch_mult=[1, 1, 2, 2, 4],
            num_res_blocks=2,
            attn_resolutions=[4],
            z_channels=32,
            embed_dim=32,  # both quantizers' dims: what the decoder's norms see
            use_dc_up_down_blocks=True,
        ),
    ),
)
