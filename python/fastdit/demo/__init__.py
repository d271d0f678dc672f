"""`fastdit demo`: a real DiT and a real video VAE, as they are and after `fastdit.accelerate`."""
