//! [`Writes`]: bytes for the device that wait for each other, to be handed over together.

use crate::gpu::Gpu;
use crate::tensor::Tensor;

/// Writes to tensors, in order. Each one handed over costs the host and the device some microseconds whatever its size, so one
/// that begins where the last one to the same tensor ends becomes a part of it.
#[derive(Debug, Default)]
pub struct Writes {
    pending: Vec<Write>,
}

#[derive(Debug)]
struct Write {
    tensor: Tensor,
    offset: u64,
    bytes: Vec<u8>,
}

impl Writes {
    /// Appends a write of `bytes` at `offset` bytes into `tensor`.
    pub fn push(&mut self, tensor: &Tensor, offset: u64, bytes: &[u8]) {
        match self.pending.iter_mut().rev().find(|write| write.tensor.is_same(tensor)) {
            Some(write) if write.offset + write.bytes.len() as u64 == offset => write.bytes.extend_from_slice(bytes),
            _ => self.pending.push(Write { tensor: tensor.clone(), offset, bytes: bytes.to_vec() }),
        }
    }

    /// Hands all over, before any work submitted later.
    pub fn flush(&mut self, gpu: &Gpu) {
        for write in self.pending.drain(..) {
            gpu.write(&write.tensor, write.offset, &write.bytes);
        }
    }
}

#[cfg(all(test, feature = "oracle"))]
mod tests {
    use super::*;
    use crate::parity;
    use crate::tensor::DType;

    #[test]
    fn writes_arrive_in_order_and_together() {
        let gpu = parity::gpu();
        let tensor = |label| Tensor::zeros(gpu, label, DType::U32, &[8]).expect("fits");
        let (a, b) = (tensor("a"), tensor("b"));
        let mut writes = Writes::default();
        for (tensor, at, values) in
            [(&a, 0, [1_u32, 2]), (&b, 3, [3, 4]), (&a, 2, [5, 6]), (&a, 1, [7, 8]), (&a, 3, [9, 10])]
        {
            writes.push(tensor, 4 * at, bytemuck::cast_slice(&values));
        }
        assert_eq!(writes.pending.iter().map(|write| write.bytes.len()).collect::<Vec<_>>(), [16, 8, 16]);
        writes.flush(gpu);
        assert!(writes.pending.is_empty());
        let read = |tensor| -> Vec<u32> { gpu.read(tensor).expect("the device works") };
        assert_eq!(read(&a), [1, 7, 8, 9, 10, 0, 0, 0]);
        assert_eq!(read(&b), [0, 0, 0, 3, 4, 0, 0, 0]);
    }
}
