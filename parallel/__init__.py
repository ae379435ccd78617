"""How a model is split over ranks: layouts, portable modules, and the megatron-core engine."""
