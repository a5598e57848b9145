"""FedAsync and FedBuff on the asynchronous loop."""
