// Eight-bit floats as fp32 numbers times a scale. Their bits at fp16's places are their number
// times a power of two, subnormals included, which fp16's conversion and one exact product undo;
// the product with the scale is the only rounding. (Formats: Micikevicius et al., "FP8 formats for
// deep learning", arXiv:2209.05433.)

struct E4M3 {
    static constexpr float kFactor = 256.0f;  // exponents are biased by 7, fp16's by 15
    static uint16_t half(uint8_t code) {
        const int sign = (code & 0x80) << 8, magnitude = code & 0x7F;
        // All ones is its one NaN; there is no infinity.
        return static_cast<uint16_t>(sign | (magnitude == 0x7F ? 0x7E00 : magnitude << 7));
    }
};
struct E5M2 {
    static constexpr float kFactor = 1.0f;  // fp16 without its last 8 bits
    static uint16_t half(uint8_t code) { return static_cast<uint16_t>(code << 8); }
};

template <class Code>
void dequantise(const uint8_t* codes, float scale, float* out, int64_t count) {
    uint16_t halves[kBlock + kLanes] = {};
    const Floats unit = spread(Code::kFactor), scales = spread(scale);
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t length = count - begin < kBlock ? count - begin : kBlock;
        for (int64_t i = 0; i < length; ++i) halves[i] = Code::half(codes[begin + i]);
        int64_t i = 0;
        for (; i + kLanes <= length; i += kLanes)
            store(F32(), out + begin + i, load(F16(), halves + i) * unit * scales);
        if (i == length) continue;
        float rest[kLanes];
        store(F32(), rest, load(F16(), halves + i) * unit * scales);
        std::memcpy(out + begin + i, rest, static_cast<size_t>(length - i) * sizeof(float));
    }
}
