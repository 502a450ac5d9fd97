"""The request loop: queue, batch, one model step at a time, receipts."""
