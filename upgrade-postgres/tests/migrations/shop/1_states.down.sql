drop type order_state;
