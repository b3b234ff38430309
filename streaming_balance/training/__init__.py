"""From plan and shards to tensors: loaders, buffers, state. The only home of torch."""
