"""What a model is made of and how it gets smaller: plan, masks, surgery, factorized layers. Knows torch, nothing of Lightning."""
