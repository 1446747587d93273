"""Self-supervised pretraining of Vim backbones: objectives, views of pictures, the training loop, the planner."""
