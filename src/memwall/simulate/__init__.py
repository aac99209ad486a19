"""What something will cost before it is built or run: simulators and hardware models.

`distserve` simulates prefill and decode on devices of their own. `hdl` turns designs written in Amaranth into Verilog,
runs them clock by clock and counts their cells; `xr_npe_hdl` is XR-NPE's multiply-add unit, `xr_npe_array` the array of
such units with its bytes, cycles and energy.
"""
