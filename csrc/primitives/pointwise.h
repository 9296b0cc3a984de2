// A tensor that is computed where it is read, entry by entry from others.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "primitives/selection.h"
#include "tensor.h"

namespace fastmerge {

// Throws std::invalid_argument for an unknown name.
Formula formula_named(const std::string& name);
Op operation_named(const std::string& name);

class Pointwise : public Elements {
   public:
    // `factors`: one for each row of the tensor, or none. Throws std::invalid_argument where the
    // arguments do not fit the formula. `operations`: an expression's, else none.
    Pointwise(Formula kind, std::vector<Span> inputs, const Span& base, std::vector<float> numbers,
              const std::optional<Selection>& selection, std::vector<float> factors,
              std::vector<Operation> operations = {});

    const void* read(int64_t first, int64_t count, DType dtype, void* buffer) const override;

   private:
    class Reading;
    void check_operations();

    Formula kind_;
    std::vector<Span> inputs_;
    Span base_;
    std::vector<float> numbers_, factors_;
    Selection selection_;
    RoundKeys keys_;
    std::vector<Operation> operations_;
    int64_t results_ = 0;
};

}  // namespace fastmerge
