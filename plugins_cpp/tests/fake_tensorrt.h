// Stand-ins for what TensorRT hands to a plugin: an expression builder that evaluates, and a logger that remembers.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <deque>
#include <initializer_list>
#include <string>

namespace fake {

class Expression final : public nvinfer1::IDimensionExpr {
  public:
    Expression(std::int64_t value, bool constant) : value_(value, constant) { mImpl = &value_; }
    ~Expression() noexcept override = default;
    std::int64_t value() const { return value_.value; }

  private:
    struct Value final : nvinfer1::apiv::VDimensionExpr {
        Value(std::int64_t v, bool c) : value(v), constant(c) {}
        bool isConstant() const override { return constant; }
        std::int64_t getConstantValue() const override { return value; }
        bool isSizeTensor() const override { return false; }
        std::int64_t value;
        bool constant;
    };
    Value value_;
};

// Evaluates every operation at once: input dimensions are made with the numbers of one call.
class Builder final : public nvinfer1::IExprBuilder {
  public:
    Builder() : evaluator_(*this) { mImpl = &evaluator_; }
    ~Builder() noexcept override = default;

    const nvinfer1::IDimensionExpr* input(std::int64_t value) { return &made_.emplace_back(value, false); }
    nvinfer1::DimsExprs shape(std::initializer_list<std::int64_t> dims) {
        nvinfer1::DimsExprs shape{};
        for (const std::int64_t dim : dims) shape.d[shape.nbDims++] = input(dim);
        return shape;
    }
    static std::int64_t value(const nvinfer1::IDimensionExpr* expression) {
        return static_cast<const Expression*>(expression)->value();
    }

  private:
    struct Evaluator final : nvinfer1::apiv::VExprBuilder {
        explicit Evaluator(Builder& b) : builder(b) {}
        const nvinfer1::IDimensionExpr* constant(std::int64_t value) override {
            return &builder.made_.emplace_back(value, true);
        }
        const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation op, const nvinfer1::IDimensionExpr& a,
                                                  const nvinfer1::IDimensionExpr& b) override {
            const std::int64_t x = value(&a);
            const std::int64_t y = value(&b);
            switch (op) {
                case nvinfer1::DimensionOperation::kSUM:
                    return builder.input(x + y);
                case nvinfer1::DimensionOperation::kMIN:
                    return builder.input(std::min(x, y));
                default:
                    return nullptr;  // the adapters use no other
            }
        }
        const nvinfer1::IDimensionExpr* declareSizeTensor(std::int32_t, const nvinfer1::IDimensionExpr&,
                                                          const nvinfer1::IDimensionExpr&) override {
            return nullptr;
        }
        Builder& builder;
    };

    std::deque<Expression> made_;
    Evaluator evaluator_;
};

class Logger final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
  public:
    void log(Severity, nvinfer1::AsciiChar const* message) noexcept override { last = message; }
    nvinfer1::ILogger* findLogger() override { return this; }
    std::string last;
};

inline nvinfer1::Dims dims(std::initializer_list<std::int64_t> values) {
    nvinfer1::Dims dims{};
    for (const std::int64_t value : values) dims.d[dims.nbDims++] = value;
    return dims;
}

inline nvinfer1::PluginTensorDesc tensor(nvinfer1::DataType type, std::initializer_list<std::int64_t> shape) {
    nvinfer1::PluginTensorDesc desc{};
    desc.dims = dims(shape);
    desc.type = type;
    desc.format = nvinfer1::PluginFormat::kLINEAR;
    desc.scale = 1.0F;
    return desc;
}

inline nvinfer1::DynamicPluginTensorDesc dynamic(nvinfer1::PluginTensorDesc desc) {
    nvinfer1::DynamicPluginTensorDesc dynamic{};
    dynamic.desc = desc;
    dynamic.min = dynamic.opt = dynamic.max = desc.dims;
    return dynamic;
}

}  // namespace fake
