namespace mw::MW_ISA { int skeleton_anchor() { return 0; } }
